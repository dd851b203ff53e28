"""Ways to put an adapter into weights, what each costs, and the files they leave: `lorax merge`."""
