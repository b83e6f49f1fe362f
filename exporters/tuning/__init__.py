"""The closing pass: what it trains, and how."""
