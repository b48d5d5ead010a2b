"""Web pages: their text, the license that they state, and whether their authors opt out."""
