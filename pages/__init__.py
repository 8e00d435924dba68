"""The page in the browser: Chat, Look inside, Watch, Data. Widgets only: what they show comes from the rooms below.

Imports common/, model/, data/, inference/, chat/, inspection/ and cleaning/.
"""
