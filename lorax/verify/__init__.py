"""Reports: lorax's own numbers measured, and held against other libraries'."""
