"""Recovery steps: each takes a QuantPlan and gives back a better one."""
