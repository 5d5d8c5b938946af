"""The space model: meshes, prototypes, creases, and its two networks."""
