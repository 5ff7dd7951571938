"""How bytes travel: one file per collective. Codecs are known here only as encode, reduce and their sizes."""
