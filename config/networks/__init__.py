"""What all networks share, and the networks of two other papers."""
