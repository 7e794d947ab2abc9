"""The few paragraphs that the tiny models' tokenizers are trained on.

Kept in the repository, so that a tokenizer is the same on every machine. Blank lines and runs of
newlines are frequent on purpose: Gemma's tokenizer merges them, and placeholder expansion has to
give the same merges as the model's own processor.
"""

from __future__ import annotations

CORPUS = """\
What is in this picture? Describe the image in one sentence.

The picture shows a cat on a wooden table, next to a cup of coffee and an open book.
How many people can you see in the photograph? There are three people in the photograph.


Compare the two images. What is the difference between the first image and the second image?
In the first image the sky is blue and the house is red. In the second image the sky is grey.



Please read the text on the sign. The text on the sign says that the road is closed.
Which colour is the car on the left? The car on the left is green, the car on the right is white.

Is there a dog in the image? No, there is no dog in the image, but there is a bird in the tree.




Here is the original image and here are some crops to help you see better.
Answer the question with a single word. Explain your answer step by step.
Where was this photo taken? It was taken at the beach, in the evening, with the sun going down.

You are a helpful assistant. You describe what you see and you do not make things up.
What time does the clock show? The clock shows ten minutes past nine.


Count the apples, the oranges and the bananas: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10.
The camera was close to the flower; its petals are yellow and its leaves are dark green.
"""
