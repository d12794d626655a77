"""What a flow is, and the distribution that its call returns."""
