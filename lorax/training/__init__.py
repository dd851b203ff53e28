"""The training floor: recipes, the loop, metrics. Nothing below it knows a recipe."""
