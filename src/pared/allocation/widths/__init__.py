"""How many channels and heads each group keeps: units, a budget and evidence in, decisions out."""
