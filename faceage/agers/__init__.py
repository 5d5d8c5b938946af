"""Networks that age a face: one module an architecture, one protocol (`base.Ager`)."""
