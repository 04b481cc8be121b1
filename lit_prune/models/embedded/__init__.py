"""The model that the package ships, so that everything runs with nothing downloaded; README.md here is its card."""
