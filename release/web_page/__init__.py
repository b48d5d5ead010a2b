"""The page of a release: `site/index.html` and the parts that it loads, made from the release's other files."""
