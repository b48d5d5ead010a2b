"""The page of a release: `site/index.html`, made from the release's other files."""
