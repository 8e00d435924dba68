"""The course's pictures: a file a picture, each with draw(language). Imports common/, data/, model/ and inspection/."""
