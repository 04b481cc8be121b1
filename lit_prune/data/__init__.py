"""Text and conversations as token windows, and the loaders that a resumed run continues."""
