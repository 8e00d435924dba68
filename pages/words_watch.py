WATCH = {}
