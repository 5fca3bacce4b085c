"""How many ranks each weight keeps: units, a budget and evidence in, decisions out; one file per allocator."""
