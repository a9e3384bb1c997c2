"""Ray Serve application, board and the vLLM plugin."""
