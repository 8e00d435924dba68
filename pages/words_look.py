LOOK = {}
