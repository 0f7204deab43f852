"""What is planted: triggers (pure functions), the plan of which pairs carry one, and a preview."""
