"""Pictures and tiles: what counts as a picture, and how it is cut, resized and normalized."""
