"""The study that KIVI's paper rests on, for any model: its keys and values, and what quantizing them costs."""
