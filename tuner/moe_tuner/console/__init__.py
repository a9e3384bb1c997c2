"""The tuner's web page: what is tuned, how well, why and at what cost; pause and pin for who has the right."""
