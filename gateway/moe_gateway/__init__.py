"""OpenAI-compatible proxy that spills to closed APIs before the SLO is lost."""
