"""What fits, how fast, at what cost; and the simulator."""
