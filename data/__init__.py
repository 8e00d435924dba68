"""From files to rows of tokens: reading, shapes of rows, the token cache, packing. Imports common/ and model/."""
