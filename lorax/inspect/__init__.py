"""Reports on a model, an adapter or a run by itself: `lorax inspect`."""
