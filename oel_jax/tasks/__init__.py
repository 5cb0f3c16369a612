"""What can be done with a policy beside the loop: distil a text into its weights, export them."""
