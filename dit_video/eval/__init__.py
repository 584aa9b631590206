"""Videos in; numbers with protocol, count and confidence out."""
