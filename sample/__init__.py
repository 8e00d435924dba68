"""Makes the embedded sample: a small world of facts, told and asked. Imports common/ and data/."""
