"""What the workflows say to an instruct model: examples, and the questions of Reflexion."""

# Three examples of the ReAct workflow (Yao et al. 2022), for instruct models.
REACT_EXAMPLES = """\
Answer the question. Write a thought, then a search; read the observation; when you know the \
answer, write Answer: and the answer in a few words.

Question: When did The Origin of Species come out?
Thought: I need the year in which The Origin of Species was published.
Search: The Origin of Species
Observation: On the Origin of Species 1: On the Origin of Species is a work of scientific \
literature by Charles Darwin, published in 1859.
 Charles Darwin 2: Charles Robert Darwin was an English naturalist, known for his contributions \
to evolutionary biology.
Thought: It was published in 1859. Answer: 1859

Question: In which country was the painter of The Night Watch born?
Thought: I need the painter of The Night Watch.
Search: The Night Watch
Observation: The Night Watch 1: The Night Watch is a 1642 painting by Rembrandt van Rijn.
Thought: Rembrandt van Rijn painted it. I need his place of birth.
Search: Rembrandt van Rijn
Observation: Rembrandt 1: Rembrandt Harmenszoon van Rijn was a Dutch painter, born in Leiden in \
the Netherlands.
Thought: He was born in Leiden in the Netherlands. Answer: Netherlands

Question: Which river is longer, the Rhine or the Seine?
Thought: I need the length of the Rhine.
Search: Rhine length
Observation: Rhine 1: The Rhine is a river of Europe, with a length of about 1,230 km.
Thought: I need the length of the Seine.
Search: Seine length
Observation: Seine 1: The Seine is a 777 km long river in northern France.
Thought: 1,230 km is more than 777 km. Answer: the Rhine

"""

# Two examples of answering from passages.
READING_EXAMPLES = """\
Answer the question from the passages, in a few words.

Passages: The Night Watch 1: The Night Watch is a 1642 painting by Rembrandt van Rijn.
 Rembrandt 2: Rembrandt Harmenszoon van Rijn was a Dutch painter, born in Leiden in the \
Netherlands.
Question: In which country was the painter of The Night Watch born?
Answer: Netherlands

Passages: Charles Darwin 1: Charles Robert Darwin was an English naturalist, known for his \
contributions to evolutionary biology.
 On the Origin of Species 2: On the Origin of Species is a work of scientific literature by \
Charles Darwin, published in 1859.
Question: When did The Origin of Species come out?
Answer: 1859

"""

# Two examples of answering at once.
DIRECT_EXAMPLES = """\
Answer the question in a few words.

Question: In which country was the painter of The Night Watch born?
Answer: Netherlands

Question: Who wrote The Origin of Species?
Answer: Charles Darwin

"""

# Two examples of a thought and an answer without a tool.
CLOSED_BOOK_EXAMPLES = """\
Answer the question in a few words.

Question: In which country was the painter of The Night Watch born?
Thought: Rembrandt painted it, and he was born in Leiden.
Answer: Netherlands

Question: Who wrote The Origin of Species?
Thought: That is a book on evolution.
Answer: Charles Darwin

"""

# Reflexion asks the model itself whether its answer stands.
JUDGE_OWN_ANSWER = """\
{tried}

The answer that was given is: {answer}
Do the observations above say that this answers the question? Yes or No:"""

# Reflexion asks what to do better in the next try.
REFLECT = """\
{tried}

The answer that was given, {answer}, is wrong or not supported. In one sentence, what should be \
searched for instead?
Next time"""
