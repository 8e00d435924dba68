"""What every room needs: errors, flags, devices, files written whole, worker processes. Imports no other room."""
