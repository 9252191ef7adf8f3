"""What things cost, measured side by side in one run, with what a user can import."""
