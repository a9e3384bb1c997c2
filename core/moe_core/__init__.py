"""Pure policies and the few shared means: clock, retry, log, HTTP client, signatures, wire types."""
