"""The course's pictures: a file a picture, each with draw(language) -> Figure. Imports common/, data/ and model/."""
