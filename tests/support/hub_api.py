"""The loopback Hub's own interface: repositories, files, uploads, commits, tags and collections."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from hub_server import LARGE, Blob, Handler, Reply, Repo, refuse


class HubHandler(Handler):
    """The Hub's own interface."""

    kind = "hub"

    def answer(self, path: str) -> None:
        body = self._body()
        if self.token is not None and self.token not in self.hub.tokens:
            raise refuse(401, "", "Invalid credentials in Authorization header")
        with self.hub.lock:
            for pattern, answer in ROUTES:
                found = re.fullmatch(pattern, f"{self.command} {path}")
                if found:
                    raise answer(self, body, *found.groups())

    def repo(self, name: str) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self.may_write(name)):
            raise refuse(404 if self.token else 401, "RepoNotFound", "Repository not found")
        return repo

    def may_write(self, name: str) -> bool:
        return name.partition("/")[0] in self.hub.tokens.get(self.token or "", ())

    def need_write(self, name: str) -> None:
        if not self.may_write(name):
            raise refuse(403 if self.token else 401, "", "You don't have the required permissions")

    def at(self, repo: Repo, revision: str | None) -> str:
        sha = repo.resolve(unquote(revision or "main"))
        if sha is None:
            raise refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def whoami(self, _: bytes) -> Reply:
        """Who has the token: what it may write to is `me` and organisations."""
        if self.token is None:
            raise refuse(401, "", "Invalid credentials in Authorization header")
        orgs = [{"name": name, "roleInOrg": "write"} for name in sorted(self.hub.tokens[self.token] - {"me"})]
        auth = {"accessToken": {"displayName": "a token", "role": self.hub.token_role}}
        return Reply(200, {"type": "user", "name": "me", "email": "me@example.org", "orgs": orgs, "auth": auth})

    def info(self, _: bytes, name: str, revision: str | None = None) -> Reply:
        repo = self.repo(name)
        sha = self.at(repo, revision)
        siblings = []
        for path, blob in sorted(repo.commits[sha].items()):
            facts: dict[str, object] = {"rfilename": path}
            if self.query.get("blobs"):
                facts |= {"size": len(blob.content), "blobId": blob.oid}
                facts |= {"lfs": blob.lfs("sha256")} if blob.large else {}
            siblings.append(facts)
        gated = "manual" if repo.gated else False
        return Reply(
            200,
            {"id": name, "modelId": name, "sha": sha, "private": repo.private, "gated": gated, "siblings": siblings},
        )

    def tree(self, _: bytes, name: str, revision: str) -> Reply:
        repo = self.repo(name)
        files = sorted(repo.commits[self.at(repo, revision)].items())
        start = int(self.query.get("cursor") or 0)
        page = [self._listed(path, blob) for path, blob in files[start : start + self.hub.page]]
        more = start + self.hub.page < len(files)
        url = f"{self.hub.endpoint}{urlsplit(self.path).path}?recursive=True&cursor={start + self.hub.page}"
        return Reply(200, page, {"Link": f'<{url}>; rel="next"'} if more else {})

    @staticmethod
    def _listed(path: str, blob: Blob) -> dict[str, object]:
        facts = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.oid}
        return facts | ({"lfs": blob.lfs("oid")} if blob.large else {})

    def paths_info(self, body: bytes, name: str, revision: str) -> Reply:
        repo = self.repo(name)
        files = repo.commits[self.at(repo, revision)]
        wanted = parse_qs(body.decode())["paths"]
        return Reply(200, [self._listed(path, files[path]) for path in wanted if path in files])

    def resolve(self, _: bytes, name: str, revision: str, path: str) -> Reply:
        repo = self.repo(name)
        if repo.gated and (self.token or "", name) not in self.hub.admitted:
            raise refuse(403 if self.token else 401, "GatedRepo", f"Access to model {name} is restricted")
        sha = self.at(repo, revision)
        blob = repo.commits[sha].get(path)
        headers = {"X-Repo-Commit": sha}
        if blob is None:
            raise Reply(404, b"", {**headers, "X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
        if not blob.large:
            return self.content(blob.content, {**headers, "ETag": f'"{blob.etag}"'})
        linked = {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.content))}
        return Reply(302, b"", {**headers, **linked, "Location": self.hub.sign(f"/large/{blob.sha256}")})

    def create(self, body: bytes) -> Reply:
        asked = json.loads(body)
        name = f"{asked.get('organization') or self._user()}/{asked['name']}"
        self.need_write(name)
        url = {"url": f"{self.hub.endpoint}/{name}", "name": name}
        if name in self.hub.repos:
            raise Reply(409, {**url, "error": "You already created this model repo"}, {"X-Error-Message": "exists"})
        self.hub.repos[name] = Repo(name, private=asked.get("visibility") == "private")
        self.hub.repos[name].commit({".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)}, title="initial")
        return Reply(200, url)

    def _user(self) -> str:
        return min(self.hub.tokens.get(self.token or "", {"nobody"}))

    def settings(self, body: bytes, name: str) -> Reply:
        self.need_write(name)
        asked = json.loads(body)
        self.repo(name).gated = bool(asked.get("gated"))
        return Reply(200, {})

    def validate_yaml(self, body: bytes) -> Reply:
        parts = json.loads(body)["content"].split("---\n")
        try:
            good = isinstance(yaml.safe_load(parts[1]), dict) if len(parts) > 2 else True
        except yaml.YAMLError:
            good = False
        return Reply(200, {"warnings": []}) if good else Reply(400, {"errors": [{"message": "bad metadata"}]})

    def preupload(self, body: bytes, name: str, revision: str) -> Reply:
        repo = self.repo(name)
        if not self.query.get("create_pr"):
            self.need_write(name)
        files = repo.commits[self.at(repo, revision)]
        answer = []
        for file in json.loads(body)["files"]:
            large = file["path"].endswith(LARGE) or file["size"] > 10_000_000
            facts = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            blob = files.get(file["path"])
            answer.append(facts | ({"oid": blob.sha256 if blob.large else blob.oid} if blob else {}))
        return Reply(200, {"files": answer})

    def lfs_batch(self, body: bytes, name: str) -> Reply:
        self.repo(name)
        if self.token is None:
            raise refuse(401, "", "log in")
        objects = [self._upload_action(name, item["oid"], item["size"]) for item in json.loads(body)["objects"]]
        return Reply(200, {"transfer": "basic", "objects": objects})

    def _upload_action(self, name: str, oid: str, size: int) -> dict[str, object]:
        facts: dict[str, object] = {"oid": oid, "size": size}
        if oid in self.hub.large:
            return facts
        verify = {"href": f"{self.hub.endpoint}/{name}.git/info/lfs/verify", "header": {}}
        if size <= self.hub.part_bytes:
            return facts | {"actions": {"upload": {"href": self.hub.sign(f"/large/{oid}")}, "verify": verify}}
        count = -(-size // self.hub.part_bytes)
        header = {str(number): self.hub.sign(f"/part/{oid}/{number}") for number in range(1, count + 1)}
        header["chunk_size"] = str(self.hub.part_bytes)
        href = f"{self.hub.endpoint}/api/complete_multipart?upload={oid}"
        return facts | {"actions": {"upload": {"href": href, "header": header}, "verify": verify}}

    def complete(self, body: bytes) -> Reply:
        asked = json.loads(body)
        parts = self.hub.uploads.get(asked["oid"], {})
        whole = b"".join(parts[number] for number in sorted(parts))
        etags = [part["etag"].strip('"') for part in asked["parts"]]
        if etags != [hashlib.md5(parts[number]).hexdigest() for number in sorted(parts)]:
            raise Reply(400, {"error": "parts are missing"})
        if hashlib.sha256(whole).hexdigest() != asked["oid"]:
            raise refuse(400, "", "the content is not what its digest says")
        self.hub.large[asked["oid"]] = whole
        return Reply(200, {})

    def lfs_verify(self, body: bytes, name: str) -> Reply:
        asked = json.loads(body)
        good = len(self.hub.large.get(asked["oid"], b"")) == asked["size"]
        return Reply(200, {}) if good else Reply(404, {"error": "no such object"})

    def commit(self, body: bytes, name: str, revision: str) -> Reply:
        repo = self.repo(name)
        request = bool(self.query.get("create_pr"))
        if not request:
            self.need_write(name)
        files = dict(repo.commits[self.at(repo, revision)])
        header: dict[str, str] = {}
        for line in body.splitlines():
            item = json.loads(line)
            header = item["value"] if item["key"] == "header" else header
            self._apply(item["key"], item["value"], files, repo.resolve(revision))
        number = sum(ref.startswith("refs/pr/") for ref in repo.refs) + 1
        sha = repo.commit(files, f"refs/pr/{number}" if request else revision, header["summary"], header["description"])
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.endpoint}/{name}/commit/{sha}"}
        return Reply(
            200, answer | ({"pullRequestUrl": f"{self.hub.endpoint}/{name}/discussions/{number}"} if request else {})
        )

    def _apply(self, key: str, value: dict[str, str], files: dict[str, Blob], head: str | None) -> None:
        wrong = self.fault is not None and self.fault.corrupt
        if key == "header" and value.get("parentCommit") not in (None, head):
            raise refuse(412, "", "A commit has happened since. Please refresh and try again.")
        if key == "file":
            content = base64.b64decode(value["content"])
            files[value["path"]] = Blob(content + b"\n" if wrong else content, False)
        elif key == "lfsFile":
            if value["oid"] not in self.hub.large:
                raise refuse(400, "", "an LFS object was not uploaded")
            content = self.hub.large[value["oid"]]
            files[value["path"]] = Blob(content + b"\n" if wrong else content, True)
        elif key == "deletedFile":
            del files[value["path"]]

    def commits(self, _: bytes, name: str, revision: str) -> Reply:
        repo = self.repo(name)
        self.at(repo, revision)
        return Reply(
            200,
            [
                {"id": sha, "title": title, "message": text, "authors": [], "date": "2026-01-01T00:00:00.000Z"}
                for sha, title, text in reversed(repo.log)
            ],
        )

    def tag(self, body: bytes, name: str, revision: str) -> Reply:
        self.need_write(name)
        repo, tag = self.repo(name), json.loads(body)["tag"]
        if tag in repo.tags:
            raise refuse(409, "", f"Tag {tag} exists already")
        repo.tags[tag] = self.at(repo, revision)
        return Reply(200, {})

    def branch(self, body: bytes, name: str, branch: str) -> Reply:
        self.need_write(name)
        repo = self.repo(name)
        if unquote(branch) in repo.refs:
            raise refuse(409, "", "Reference already exists")
        repo.refs[unquote(branch)] = self.at(repo, json.loads(body or b"{}").get("startingPoint"))
        return Reply(200, {})

    def refs(self, _: bytes, name: str) -> Reply:
        repo = self.repo(name)
        listed = {
            "branches": [r for r in repo.refs.items() if not r[0].startswith("refs/")],
            "tags": list(repo.tags.items()),
            "pullRequests": [r for r in repo.refs.items() if r[0].startswith("refs/pr/")],
            "converts": [],
        }
        return Reply(
            200,
            {
                kind: [{"name": ref, "ref": f"refs/{ref}", "targetCommit": sha} for ref, sha in found]
                for kind, found in listed.items()
            },
        )

    def collection(self, _: bytes, slug: str) -> Reply:
        if slug not in self.hub.collections:
            raise refuse(404, "", "no such collection")
        items = [{"_id": name, "id": name, "type": "model", "position": 0} for name in self.hub.collections[slug]]
        return Reply(
            200,
            {"slug": slug, "title": slug, "owner": {"name": slug.split("/")[0]}, "items": items,
             "lastUpdated": "2026-01-01T00:00:00.000Z", "position": 0, "private": True, "theme": "blue", "upvotes": 0},
        )  # fmt: skip

    def create_collection(self, body: bytes) -> Reply:
        asked = json.loads(body)
        self.need_write(f"{asked['namespace']}/")
        slug = f"{asked['namespace']}/{asked['title'].lower().replace(' ', '-')}-64f9a55bb3115b4f513ec026"
        if slug in self.hub.collections:
            raise Reply(409, {"error": "Collection already exists", "slug": slug}, {"X-Error-Message": "exists"})
        self.hub.collections[slug] = []
        return self.collection(b"", slug)

    def add_to_collection(self, body: bytes, slug: str) -> Reply:
        self.need_write(slug)
        held = self.hub.collections.get(slug)
        if held is None:
            raise refuse(404, "", "no such collection")
        item = json.loads(body)["item"]["id"]
        if item in held:
            raise refuse(409, "", "already there")
        held.append(item)
        return self.collection(b"", slug)


_ID = r"([\w.\-]+/[\w.\-]+)"
_MODEL = rf"/api/models/{_ID}"
ROUTES = [
    (r"GET /api/whoami-v2", HubHandler.whoami),
    (rf"GET {_MODEL}", HubHandler.info),
    (rf"GET {_MODEL}/revision/(.+)", HubHandler.info),
    (rf"GET {_MODEL}/tree/([^?]+)", HubHandler.tree),
    (rf"GET {_MODEL}/refs", HubHandler.refs),
    (rf"GET {_MODEL}/commits/(.+)", HubHandler.commits),
    (rf"POST {_MODEL}/paths-info/(.+)", HubHandler.paths_info),
    (rf"(?:GET|HEAD) /{_ID}/resolve/((?:refs/pr/)?[^/]+)/(.+)", HubHandler.resolve),
    (r"POST /api/repos/create", HubHandler.create),
    (r"POST /api/validate-yaml", HubHandler.validate_yaml),
    (rf"PUT {_MODEL}/settings", HubHandler.settings),
    (rf"POST {_MODEL}/preupload/(.+)", HubHandler.preupload),
    (rf"POST {_MODEL}/commit/(.+)", HubHandler.commit),
    (rf"POST {_MODEL}/tag/(.+)", HubHandler.tag),
    (rf"POST {_MODEL}/branch/(.+)", HubHandler.branch),
    (rf"POST /{_ID}.git/info/lfs/objects/batch", HubHandler.lfs_batch),
    (rf"POST /{_ID}.git/info/lfs/verify", HubHandler.lfs_verify),
    (r"POST /api/complete_multipart", HubHandler.complete),
    (r"POST /api/collections", HubHandler.create_collection),
    (rf"GET /api/collections/{_ID}", HubHandler.collection),
    (rf"POST /api/collections/{_ID}/items", HubHandler.add_to_collection),
]
