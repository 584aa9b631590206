"""Tools that make and look at data: the world written as shards, real footage cut and packed."""
