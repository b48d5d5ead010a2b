"""`atom chat`: a released model that is talked to in the terminal."""
