"""The model that ships with the package, so that everything runs without downloads; README.md is its card."""
