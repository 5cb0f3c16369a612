"""What a policy can do and what it kept: pass rate, token efficiency, retention, leaks."""
