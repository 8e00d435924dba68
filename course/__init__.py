"""How the course's pages are kept true to the code and to recorded runs. Imports common/ and figures/."""
