"""The simulator: a gateway, engines and closed APIs as discrete events, so that a policy is tried before traffic is."""
