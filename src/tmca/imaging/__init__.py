"""Files to upright arrays and back, with their geometry."""
