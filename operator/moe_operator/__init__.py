"""The controller: snapshot, plan, apply."""
