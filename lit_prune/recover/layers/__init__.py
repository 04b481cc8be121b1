"""The layers under an adapter: in float32, masked, masked over quantised weights."""
