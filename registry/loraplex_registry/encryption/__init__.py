"""Client-side envelope encryption: data keys, key-encryption keys, and changing them."""
