"""Lorax held against PEFT over transformers, part by part: `lorax verify`."""
