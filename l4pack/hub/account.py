"""Whose token it is, and whether it may write to a repository, asked before anything is sent."""

from __future__ import annotations

from huggingface_hub import HfApi, get_token

from l4pack.errors import HubError
from l4pack.hub.answers import Account
from l4pack.hub.client import LOG_IN, hub_errors, patiently


def writer(api: HfApi, repo_id: str, *, proposes: bool = False) -> str:
    """Who would write to a repository, in words. Raises HubError where the Hub says that the token may not.

    What a fine-grained token may do is for the Hub to know: it is named as one. Who only `proposes`, by a pull request,
    need not belong to the owner.
    """
    if api.token is None and get_token() is None:
        raise HubError("there is no token to write with", hint=LOG_IN)
    with hub_errors(api, repo_id):
        found = patiently(api.whoami)
    account, owner = Account.model_validate(found), repo_id.partition("/")[0]
    role = account.auth.accessToken.role if account.auth.accessToken else None
    if role == "read":
        raise HubError(
            f"the token of {account.name} may only read", hint="make one that may write, then log in with it"
        )
    roles = {account.name: "its owner"} | {one.name: one.roleInOrg or "a member" for one in account.orgs}
    if proposes and owner not in roles:
        return f"as {account.name}"
    if not proposes and (owner not in roles or roles[owner] == "read"):
        hint = f"name a repository of {' or '.join(name for name, part in roles.items() if part != 'read')}"
        raise HubError(f"{account.name} may not write to {owner}", hint=hint)
    token = ", by a fine-grained token, which may be allowed less" if role == "fineGrained" else ""
    return (
        f"as {account.name}, {roles[owner]} of {owner}{token}" if owner != account.name else f"as {account.name}{token}"
    )
