"""Networks that read faces: identity, age, and the recognition teacher."""
