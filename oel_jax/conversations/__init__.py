"""What was said: messages, conversations, and the prompts that are cut from them."""
