"""Inputs of a model: text, pictures, chats and questions."""
