"""The demo models that ship with jaxinfer (`model/`, its `draft/`), and how they were trained."""
